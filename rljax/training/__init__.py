"""What every run needs: its folder, logs, optimizer and compiled programs."""
