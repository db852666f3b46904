"""Speed, memory and accuracy beside other implementations, as ratios: `python -m benchmarks.NAME [--quick]`."""
