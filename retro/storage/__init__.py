"""Files that know what made them: written whole, locked, hashed, in shards; JSON objects with their checksum."""
