"""The few colours of all pictures."""

TRUTH, FOUND = "#00b3a4", "#ff9f1c"
MAP_COLOURS = "inferno"
