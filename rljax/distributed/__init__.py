"""Devices, processes and programs."""
