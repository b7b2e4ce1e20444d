"""Domain adaptation: labelled source images, unlabelled ones of the target."""
