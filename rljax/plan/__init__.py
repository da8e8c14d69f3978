"""Compiles the programs of a script for machines that are not there."""
