// The sizes on offer. Sides are multiples of 16, ratios exact.

const SHAPES = [
  ["Square 1:1", 1, 1, [256, 512, 768, 1024, 1280, 1536, 2048]],
  ["Landscape 3:2", 3, 2, [384, 768, 1152, 1536, 1920]],
  ["Portrait 2:3", 2, 3, [256, 512, 768, 1024, 1280]],
  ["Wide 16:9", 16, 9, [512, 768, 1024, 1280, 1536, 1792, 2048]],
  ["Tall 9:16", 9, 16, [288, 432, 576, 720, 864, 1008, 1152]],
];

export const CUSTOM = "custom";
const PREFERRED_SIDE = 1024;

/** Width and height of "WIDTHxHEIGHT". */
export function sidesOf(size) {
  return size.split("x").map(Number);
}

/** Fill a select with what a model's limits allow; `kept` stays chosen where it can. */
export function offerSizes(select, model, kept) {
  const { max_side: maxSide, max_pixels: maxPixels, trained_side: trainedSide } = model;
  const allowed = [];
  select.replaceChildren();
  for (const [label, across, down, widths] of SHAPES) {
    const group = document.createElement("optgroup");
    group.label = label;
    for (const width of widths) {
      const height = (width / across) * down;
      if (Math.max(width, height) > maxSide || width * height > maxPixels) continue;
      group.append(new Option(`${width} × ${height}`, `${width}x${height}`));
      allowed.push(`${width}x${height}`);
    }
    if (group.childElementCount > 0) select.append(group);
  }
  select.append(new Option("Custom…", CUSTOM));
  const squares = allowed.filter((size) => sidesOf(size)[0] === sidesOf(size)[1]);
  const side = Math.min(PREFERRED_SIDE, trainedSide);
  const generatedWell = squares.findLast((size) => sidesOf(size)[0] <= side);
  const wishes = [kept, generatedWell, squares[0]];
  select.value = wishes.find((size) => size === CUSTOM || allowed.includes(size)) ?? CUSTOM;
}
