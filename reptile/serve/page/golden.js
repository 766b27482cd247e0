/** Moved to client/golden.js; this path is kept for pages that already import it. */

export * from "./client/golden.js";
