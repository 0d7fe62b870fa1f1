"""One module for each library that is measured, run in a process of its own, so that none pays for another's imports."""
