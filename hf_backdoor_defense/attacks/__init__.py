"""Simulated backdoor attacks, so that defenses can be measured: triggers, data poisoning, weight poisoning."""
