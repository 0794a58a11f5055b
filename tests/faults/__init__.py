"""The real program, one fault at one named moment, started again, and compared with a run that nobody disturbed."""
