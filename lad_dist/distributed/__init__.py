"""Processes of a run: ranks, devices, collectives, the watchdog, the comparison of replicas."""
