"""What a hub and its participants say to each other."""
