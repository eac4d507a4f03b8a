"""A real Slurm of two nodes on this machine, for the tests and the drill of jobs."""
