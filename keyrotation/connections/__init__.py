"""How we reach the outside, for every adapter alike: bounded HTTP exchanges, database transactions, named statements."""
