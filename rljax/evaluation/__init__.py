"""Measures a policy's answers, and shows them as pictures and pages."""
