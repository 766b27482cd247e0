"""Measurements of this project against plain references; run by hand, never by tests."""
