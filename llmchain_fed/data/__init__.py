"""Examples as people have them, as text, and as masked token ids."""
