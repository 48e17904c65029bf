"""What a database of any size will take: rates measured on this machine, and counting."""
