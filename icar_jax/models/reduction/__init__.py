"""Token reduction inside the towers: ToMe, PiToMe, CrossGET and dropping (HiRED), and the merging between blocks."""
