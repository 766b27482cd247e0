/** Moved to client/background.js; this path is kept for pages that already import it. */

export * from "./client/background.js";
