"""apprentice.yaml: read with the place of every value, checked as a whole, described for editors."""
