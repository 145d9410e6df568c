"""Data that can be trusted: read, check, remove duplicates, keep a ledger, tokenise and mask."""
