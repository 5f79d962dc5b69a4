"""The domain, pure and from the standard library only: no clock, no I/O. Decisions are values with a reason and a message."""
