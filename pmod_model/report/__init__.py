"""The page and the tables that compare a p-MoD run with its dense twin."""
