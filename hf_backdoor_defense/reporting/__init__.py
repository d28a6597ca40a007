"""What was measured, for others to read: records in files (`results`), tables (`tables`), figures (`plots`)."""
