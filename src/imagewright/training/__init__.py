"""The trainer, averages, checkpoints and run directories: nothing here knows a paper."""
