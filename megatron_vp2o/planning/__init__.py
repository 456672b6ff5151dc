"""What a recipe needs before it is started: arithmetic on settings (no torch at import), and `simulate`, which builds a rank."""
