"""How much may be spent where a chapter runs the model many times."""

from __future__ import annotations

from dataclasses import dataclass

MIN_IMAGES = 30  # with fewer, intervals say nothing
# Of two cores with AVX-512, which do 6e10 in a second with edited attention: 500 images of the default model, 1.4e7 an
# image and pass, take 0.17 s on one of them (docs/models.md), and 1.3 times that edited. Cores without it may take
# three times as long. Time is not measured where the analysis runs, so that it takes the same images everywhere.
TWO_MINUTES = 7.2e12


@dataclass(frozen=True)
class Budget:
    images: int | None  # of a stratified subset; None for all
    controls: int  # models with random weights
    max_cost: float | None = None  # of a chapter, in passes x images x parameters x tokens; None for no bound

    def affordable_images(self, cost_of_image: float, num_images: int, of_all: bool = False) -> int | None:
        """Return how many of `num_images` a chapter can afford at so much each; None where that is too few.

        of_all: a chapter that counts errors, which are few, takes as many of all images as two minutes allow.
        """
        if self.max_cost is None:  # as many as were asked for
            return num_images if self.images is None else self.images
        wanted, max_cost = self.images, self.max_cost
        if of_all:
            wanted, max_cost = None, max(max_cost, TWO_MINUTES)
        count = min(num_images if wanted is None else wanted, int(max_cost / cost_of_image))
        return None if count < MIN_IMAGES else count


QUICK, FULL = Budget(500, 3, 1e12), Budget(2000, 10, 1e13)
