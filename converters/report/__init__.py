"""What a proof looks like: a table for people, JSON and JUnit for machines."""
