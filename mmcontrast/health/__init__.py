"""Is the run well? What is measured of it now and then, and what that means in plain language."""
