"""Fault drills at full count, for people: `make drills TRIALS=n`."""
