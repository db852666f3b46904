"""What a run will take, before it is paid for: towers are counted, the step is worked out, and a table is printed."""
