"""Reading and writing files so that a reader finds them whole, whoever else writes."""
