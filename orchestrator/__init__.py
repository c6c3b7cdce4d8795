"""Many trials in, a ledger out. The top of the house: the command line lives here."""
