"""What every room uses: errors, files, devices, calls into a network's code."""
