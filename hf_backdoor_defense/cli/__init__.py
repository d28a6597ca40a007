"""`hfbd VERB`: parsing only. The work is in `experiment` and below."""
