"""What the project is made with and users do not need: it is not in the wheel."""
