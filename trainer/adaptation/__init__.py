"""Domain adaptation: labelled source pictures, unlabelled ones of the target."""
