"""What MODEL and SPEC strings name."""
