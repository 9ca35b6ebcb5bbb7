"""The landing zone, and parsing of delivered files into rows."""
