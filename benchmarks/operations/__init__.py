"""Each operation compared with torch's."""
