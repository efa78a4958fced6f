"""The one label that is not a class."""

NULL_LABEL = -1  # "no class"; users and data sets only ever see 0..K-1
