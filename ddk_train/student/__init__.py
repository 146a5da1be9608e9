"""The student: loaded, adapted, cut from its teacher, saved."""
