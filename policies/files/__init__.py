"""What every policy may use about weight files: who a file is, its mapping, and which bytes come from it."""
