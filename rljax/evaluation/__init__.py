"""What a policy's answers are worth, as numbers, pictures and pages."""
