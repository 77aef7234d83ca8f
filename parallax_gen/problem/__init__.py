"""What is asked, where it runs and how it could be done: pure data and functions, no device and no disk."""
