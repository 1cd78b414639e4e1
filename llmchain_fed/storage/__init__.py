"""Files and folders of this account: written whole, locked, exchanged at once."""
