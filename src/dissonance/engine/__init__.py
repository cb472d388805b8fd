"""Where work runs. local.py: processes of this machine, one for each core."""
