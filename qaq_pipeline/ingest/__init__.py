"""Deliveries in the landing zone, and delivered files as rows."""
