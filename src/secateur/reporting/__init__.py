"""The HTML report, made from the folders that the other commands wrote."""
