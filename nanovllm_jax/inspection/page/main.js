// Draws everything, and what belongs to a program again when another one is chosen.

function choose(name) {
  const program = REPORT.programs.find((one) => one.name === name);
  document.querySelectorAll("#program button").forEach((button) => button.setAttribute("aria-checked", button.textContent === name));
  drawKernels(program);
  drawRoofline(program);
  drawTexts(program);
}

setUpTheme();
drawCard();
drawFindings();
drawBuckets();
drawMemory();
drawSteps();
drawCompilations();
drawDiff();
$("#program").replaceChildren(...REPORT.programs.map((one) =>
  h("button", { type: "button", role: "radio", "aria-checked": "false", onclick: () => choose(one.name) }, one.name)));
$("#search").addEventListener("input", (event) => search(event.target.value));
$("#search").addEventListener("keydown", (event) => event.key === "Enter" && go(event.shiftKey ? -1 : 1));
$("#previous").addEventListener("click", () => go(-1));
$("#next").addEventListener("click", () => go(1));
choose(REPORT.programs[0].name);
