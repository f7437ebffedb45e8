"""What both halves must agree on, and nothing else: key material, Valkey names, engine traits. Pure: no Django, no I/O."""
