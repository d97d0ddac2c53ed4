"""What DRT is compared with; importing this registers them with the Auto classes."""
